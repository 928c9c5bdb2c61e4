"""Training: one concern a file.

launch        processes, devices, threads       engine        DeepSpeed or plain PyTorch behind one interface
corpus        configured sources -> datasets    stream        which rows a step sees, on which rank
optimization  rates per part, schedule          rate          the rate to begin with
loop          the steps                         two_phase     LoRI-S without a mask: two runs in one
validation    loss and exact answers meanwhile  bad_steps     losses that are not finite, spikes
memory        formulas of a step's memory       forecast      prediction, comparison, advice
checkpoint    whole folders                     resume        where a run begins, and as which
stopping      signals: save and leave           peers         a rank that does not answer any more
disk          full, read-only, failing disks    world         the miniature world of data.world
watch         metrics.jsonl, TensorBoard, W&B   finish        final/, evaluation, report, model card
packing       samples that share rows
"""
