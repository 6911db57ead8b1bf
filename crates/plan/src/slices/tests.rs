//! Tables for the endpoint compilers.
