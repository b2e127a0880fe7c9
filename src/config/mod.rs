//! What the user wrote, checked: flags over environment over files over the data directory over
//! defaults. Every value remembers where it came from.

mod advertise;
mod check;
mod fault;
mod file;
mod keys;
mod origin;
mod runtime;
mod settings;

pub use advertise::{default_advertise, hostname};
pub use check::{
    Overrides, advertise as advertise_address, default_config, load, load_texts,
    mesh_listen as mesh_address, validate,
};
pub use fault::{ConfigError, Fault};
pub use origin::{Origin, Setting};
pub use runtime::{NodeFile, RuntimeFile};
pub use settings::{
    API_PORT, DOMAIN, DRAIN_DEADLINE, FORGET_AFTER, MESH_PORT, PublicService, Seed, SeedError,
    Settings, default_data_dir,
};
