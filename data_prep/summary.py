"""summary"""
def summarise(*a): pass
