"""Results as text for people, from the same plain data that `--json` prints; and what this machine
has."""
