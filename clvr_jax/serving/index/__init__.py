"""The index of loops, in SQLite or PostgreSQL, their files, in a directory or a bucket, and how replicas share both."""
