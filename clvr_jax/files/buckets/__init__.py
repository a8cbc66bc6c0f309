"""Files in buckets of Google Cloud Storage: paths such as gs://NAME/PREFIX, objects, locks, and copies on a disk."""
