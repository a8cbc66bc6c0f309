"""Small synthetic worlds whose images a program can render, detect and check."""
