"""The command line: a file per verb, thin over the public interface and `tmlc.report`."""
