class LoRARequest:
    def __init__(self, *, lora_name, lora_int_id, lora_path):
        self.lora_path = lora_path
