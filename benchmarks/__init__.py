"""One script a claim, each with `main(argv)`; `rlhf-ray bench NAME` runs it and prints the table the README
shows."""
