"""What compilers make of our programs: for developers."""
