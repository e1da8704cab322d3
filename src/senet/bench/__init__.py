"""Fair timings against named peers, contestants in turns."""
