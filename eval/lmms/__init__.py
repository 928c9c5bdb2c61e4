"""lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): a run as one of its chat models, AVE and MUSIC-AVQA as its tasks.

    task --doc_to_messages--> messages --messages.py, media.py--> Sample --model.py--> text --task.py--> score

lmms-eval pins other versions of libraries than this project, so it lives in an environment of its own:

    uv venv ../lmms
    uv pip install --python ../lmms "lmms-eval[audio]==0.7.3" -e . --override eval/lmms/overrides.txt
    AVE_DIR=datasets/AVE ../lmms/bin/python -m lmms_eval --model mokamm --model_args run=runs/ave \
        --include_path eval/lmms/tasks --tasks ave --batch_size 8

Only entry_point.py, model.py and task.py import lmms-eval; they are loaded by it, never by the rest of the project.
"""
