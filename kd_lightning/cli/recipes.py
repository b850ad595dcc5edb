"""`kd-lightning recipes`."""

from kd_lightning.recipes import METHODS, describe, distilling_folders, recipe_files, recipe_names


def recipes() -> None:
    """List the recipes that `-c` takes by name, with a line each."""
    methods = {name: describe(name) for name in recipe_names() if recipe_files(name)[-1].parent == METHODS}
    own = {name: describe(name) for name in recipe_names() if name not in methods}
    shared = {name.partition("/")[2]: text for name, text in methods.items()}
    width = max(map(len, [*own, *(f".../{name}" for name in shared)]))
    for name, text in own.items():
        print(f"{name:<{width}}  {text}")
    folders = ", ".join(f"{folder.name}/" for folder in distilling_folders())
    print(f"\nAlso below each of {folders} with the networks of its distill:")
    for name, text in shared.items():
        print(f"{f'.../{name}':<{width}}  {text}")
    print("\n`kd-lightning compress -c digits` (or cifar10, cifar100, folder) runs a whole chain of them.")
