//! An nf_tables object model with transactions, a text and a netlink executor, and a fake.
