"""Files for other runtimes: export, its forms, and the runtimes' sessions."""
