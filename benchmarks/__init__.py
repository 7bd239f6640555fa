"""Speed against peers and claims over seeds; results are kept as files."""
