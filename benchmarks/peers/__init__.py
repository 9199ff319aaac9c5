"""What `end-to-end` compares with: each a script that runs in a process of its own."""
