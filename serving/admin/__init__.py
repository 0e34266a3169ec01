"""/admin/: the adapter revisions, their labels and routing policies, for who has an admin key."""
