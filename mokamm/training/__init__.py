"""Training: one concern a file.

launch        processes, devices, threads            engine        DeepSpeed or plain PyTorch behind one interface
corpus        configured sources -> datasets          stream        which rows a step sees, on which rank
optimization  rates per part, schedule                loop          the steps
validation    loss and exact answers while training   checkpoint    whole folders, resume
memory        formulas of a step's memory             forecast      prediction, comparison, advice
watch         metrics.jsonl, TensorBoard, W&B         finish        final/, evaluation, report, model card
resume        where a run begins, and as which         stopping      signals: save and leave
bad_steps     losses that are not finite, spikes
"""
