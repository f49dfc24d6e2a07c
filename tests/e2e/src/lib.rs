//! The user's way through the whole product: the commands of the README, as a person or a script would run them.
//!
//! Everything is under `tests/`. Must never know: anything that a user does not see.
