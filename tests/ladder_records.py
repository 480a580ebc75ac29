"""Records of three recipes with three seeds, in 1 and 4 steps, as from an ablation."""


def ladder_records():
    return [
        {
            'recipe': recipe,
            'seed': seed,
            'steps': steps,
            'guidance': 0.0,
            'network_calls': steps,
            'fd': base + seed + steps,
            'accuracy': 0.5,
            'trained_steps': 500,
            'step_gflop': 4.0,
        }
        for recipe, base in (('sm', 20.0), ('ism', 10.0), ('flow_matching', 30.0))
        for seed in (0, 1, 2)
        for steps in (1, 4)
    ]
