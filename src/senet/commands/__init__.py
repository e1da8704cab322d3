"""What a command does; the command line shows it."""
