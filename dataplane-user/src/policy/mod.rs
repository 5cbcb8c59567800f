//! Who may talk to whom: L4 authorization, and whether plaintext may enter.
