"""What training costs, each a ratio measured in one run."""
