from vq_core.port import Port

class NullPort(Port):
    def __init__(self, name: str, copy: bool = False, endpoints: int = 1) -> None: ...
