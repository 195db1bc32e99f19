"""What a teacher has to show before step 0."""
