"""What is left of files when a disk, a process or a network fails."""
