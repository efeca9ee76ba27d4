"""Glue: the variables users type, the steps as doit tasks, and how doit reports them."""
