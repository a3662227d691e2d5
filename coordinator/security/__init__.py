"""Who may do what: tokens and secrets, and how they are read and compared. No request and no route is known here."""
