"""Where images come from: the embedded set, folders, Hugging Face."""
