"""What every run needs, whatever it learns. No equation lives here.

    options.py          the command line: options shared by all stages, recipes, -h
    option_values.py    their types and ranges
    option_names.py     names of options in other libraries, and what was probably meant
    run.py              Run: a page's device, folder, log, checkpoints and micro-batches
    device.py           cpu, cuda or mps, and a model on it
    stop.py             Ctrl-C: a checkpoint before the end
    batches.py          which examples a step trains on, and its micro-batches
    dist.py             several processes: printing once, adding up gradients
    sharding.py         models whose weights are spread over the processes
    models.py           models by name: new ones, checkpoints, GPT-2
    checkpoints.py      saving and loading
    compared.py         models that are compared, with the data and temperature they share
    prerequisites.py    where runs lie, and those that a stage starts from
    digests.py          what a run is made of, to be compared by --resume
    optim.py            AdamW, the learning rate's schedule, the optimizer step
    examine.py          an example as a model sees it, and what looks wrong with the data
    log.py              log.jsonl, the console, metrics of a step
    scoring.py          scores and log-probs of many responses
    grids.py            PPO's grid of numbers, one per response token
    preferences.py      how well rewards order held-out comparisons
    frontier.py         the most reward at each KL, and the gap to it
    standard_errors.py  means over prompts, and their errors
    tables.py           rows of numbers as text
    plots.py            the picture of the frontier
    curves.py           pictures of what runs logged
    files.py            files that are written completely or not at all
"""
