"""The streaming runtime: engines, slots, sessions, ticks, clocks. Imports numpy and `tmlc.package` only."""
