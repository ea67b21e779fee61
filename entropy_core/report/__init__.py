"""What people read: the page, its sections and its figures."""
