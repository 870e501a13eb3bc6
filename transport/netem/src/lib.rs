//! Bad weather for tests and demonstrations: a seeded model of a path and a real UDP relay that obeys it.
