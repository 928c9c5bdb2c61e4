"""Parts of eval/compare.py: settings (what to compare), plan (which run comes next), work (one run, in a process of its
own), pool (processes and progress), differences (statistics), results and report (what came out)."""
