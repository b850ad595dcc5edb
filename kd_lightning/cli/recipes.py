"""`kd-lightning recipes`."""

from kd_lightning.recipes import describe, is_shared, method_folders, recipe_names


def recipes() -> None:
    """List the recipes that `-c` takes by name, with a line each."""
    names = recipe_names()
    own = {name: describe(name) for name in names if not is_shared(name)}
    shared = {f".../{name.partition('/')[2]}": describe(name) for name in names if is_shared(name)}
    width = max(map(len, [*own, *shared]))
    for name, text in own.items():
        print(f"{name:<{width}}  {text}")
    folders = ", ".join(f"{folder}/" for folder in method_folders())
    print(f"\nAlso below each of {folders} with the networks of its distill:")
    for name, text in shared.items():
        print(f"{name:<{width}}  {text}")
    print("\n`kd-lightning compress -c digits` (or cifar10, cifar100, photos) runs a whole chain of them.")
