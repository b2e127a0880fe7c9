//! From one member to another nothing passes, in one direction only.

use std::time::Duration;

use murmesh::mesh::MeshEvent;

use crate::figures::with_seeds;
use crate::world::World;

#[test]
fn one_way_cut_kills_nobody_mesh_wide() {
    let name = "one_way_cut_kills_nobody_mesh_wide";
    let deaths = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 32);
        world.network.cuts = vec![(3, 4), (5, 6), (7, 8)];
        world.run_for(Duration::from_secs(120));
        let downs =
            world.log.iter().filter(|(.., event)| matches!(event, MeshEvent::MemberDown { .. }));
        let downs = downs.count();
        world.end_faults();
        downs
    });
    println!("{name}: 32 members, 3 one-way cuts, 120 s: {deaths:?} declarations of death");
    assert_eq!(deaths.iter().sum::<usize>(), 0);
}
