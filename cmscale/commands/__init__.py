"""What all commands share: which option is used where, one-line usage errors, and how a command ends."""
