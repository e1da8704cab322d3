"""Small things that everything above uses: files, text, allocator, device, progress."""
