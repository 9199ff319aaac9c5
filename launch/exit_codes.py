"""How the command, and the driver of a job, end."""

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
