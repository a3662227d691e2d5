variable "head" {
  description = "The Ray head of the farm, host:port, as the Macs reach it in a private network."
  type        = string
  validation {
    condition     = can(regex("^[0-9]{1,3}([.][0-9]{1,3}){3}:[0-9]{2,5}$", var.head))
    error_message = "The head wants a numeric address and a port, such as 10.0.0.5:6379."
  }
}

variable "source_url" {
  description = "Address of an archive of drover (tar.gz) that Macs fetch."
  type        = string
  validation {
    condition     = startswith(var.source_url, "https://")
    error_message = "The address of drover's archive wants https, because machines run what is in it."
  }
}

variable "source_sha256" {
  description = "Its SHA-256, hexadecimal."
  type        = string
  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.source_sha256))
    error_message = "The hash of drover's archive wants 64 hexadecimal digits: sha256sum prints them."
  }
}

variable "ray_token_file" {
  description = "File here with the farm's Ray token, which is brought over ssh and is in no state."
  type        = string
  validation {
    condition     = try(fileexists(var.ray_token_file), false) && can(regex("^[0-9A-Za-z_-]{32,}\\s*$", file(var.ray_token_file)))
    error_message = "The file of the Ray token is missing or holds no token: it is ray-token among the coordinator's secrets."
  }
}

variable "private_key_file" {
  description = "File of the private key for ssh; empty: the agent's."
  type        = string
  default     = ""
  validation {
    condition     = var.private_key_file == "" || try(fileexists(var.private_key_file), false)
    error_message = "The file of the private key does not exist; leave it out to use the agent's."
  }
}

variable "connect_within_s" {
  description = "Seconds within which ssh reaches each Mac. Terraform tries until then, also with a host key that is another."
  type        = number
  default     = 60
  validation {
    condition     = var.connect_within_s >= 1 && var.connect_within_s <= 600
    error_message = "Macs may take 1 to 600 seconds to answer."
  }
}

variable "grace_s" {
  description = "Seconds in which running builds may end before a worker stops."
  type        = number
  default     = 3600
  validation {
    condition     = var.grace_s >= 0 && var.grace_s <= 3600
    error_message = "Builds may have 0 to 3600 seconds to end: launchd kills after 3700."
  }
}

variable "macs" {
  description = "Macs by name: where ssh reaches them and with which host key, a user that may use sudo without a password, the address in the farm's network (empty: that of ssh), and what they take."
  type = map(object({
    ssh_host = string
    host_key = string
    port     = optional(number, 22)
    user     = optional(string, "admin")
    address  = optional(string, "")
    slots    = optional(number, 2)
    features = optional(list(string), [])
  }))
  validation {
    condition     = alltrue([for name in keys(var.macs) : can(regex("^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$", name))])
    error_message = "A Mac's name wants 1 to 63 letters, digits, dots, dashes and underscores: it is the worker's."
  }
  validation {
    condition     = alltrue([for mac in var.macs : can(regex("^[0-9]{1,3}([.][0-9]{1,3}){3}$", mac.address == "" ? mac.ssh_host : mac.address))])
    error_message = "A Mac wants a numeric address in the farm's network, by which Ray's nodes reach it: set address where ssh_host is a name."
  }
  validation {
    condition     = alltrue([for mac in var.macs : can(regex("^(ssh-ed25519|ecdsa-sha2-nistp[0-9]+|ssh-rsa) [A-Za-z0-9+/=]+", mac.host_key))])
    error_message = "A Mac wants its host key, because it gets the Ray token over ssh: ssh-keyscan -t ecdsa HOST prints the one that Terraform asks for; compare it with /etc/ssh/ssh_host_ecdsa_key.pub there."
  }
  validation {
    condition     = length(distinct([for mac in var.macs : "${mac.ssh_host}:${mac.port}"])) == length(var.macs)
    error_message = "Two of the Macs are the same machine: a Mac is one worker."
  }
  validation {
    condition     = alltrue([for mac in var.macs : mac.slots >= 1 && floor(mac.slots) == mac.slots])
    error_message = "A Mac wants 1 or more slots."
  }
}
