"""What the tests of several folders share: `from helpers.made_runs import write_run`."""
