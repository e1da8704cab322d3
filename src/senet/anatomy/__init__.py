"""What any model consists of: a recording of its run, its SE blocks."""
