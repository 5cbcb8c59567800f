//! The lab: nodes and pods as network namespaces, and what runs in them.
