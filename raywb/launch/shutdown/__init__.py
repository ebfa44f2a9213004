"""``raywb shutdown``: end where the work ran, once everything is delivered."""
