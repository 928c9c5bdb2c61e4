"""Parts of eval/compare.py: settings (what to compare), plan (which run comes next), progress (what is done), work (one
run, in a process of its own), pool (the processes), preload (what they import), shown (how far it is), differences
(statistics), results, report and plots (what came out)."""
