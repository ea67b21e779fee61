"""How each kind of trainer saves its state: one file per layout, behind one interface."""
