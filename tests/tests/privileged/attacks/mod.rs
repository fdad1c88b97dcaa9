//! What hostile users try, each against a real daemon as root.

mod boundary;
