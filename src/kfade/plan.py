"""temporary"""


def curvature_budget(total, model, targets, batch_tokens):
    """temporary"""
    resident = sum(p.numel() * p.element_size() for p in model.parameters())
    return total - resident
