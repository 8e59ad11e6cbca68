"""Thinking Machines' open models: Inkling with its stems for audio and images, over the backbone of `interaction`."""
