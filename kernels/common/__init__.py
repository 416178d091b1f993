"""What the kernel families share: backend choice, argument checks, dropout, launch configurations."""
