//! Programs compiled Services into the kernel of one node.
