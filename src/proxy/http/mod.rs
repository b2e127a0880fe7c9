//! Requests, where a service speaks HTTP.
#![allow(dead_code)] // the exchange, which uses them, is on its way

mod gate;
mod head;
